"""
The README's picture of what a run of train_diffusion.py drew from the same noise as it learned, made by hand:

    python tests/figures.py out/diffusion        # assets/glyphs.png
"""

import re
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

grids = sorted(Path(sys.argv[1], "samples").glob("*.png"))
pieces = [Image.open(path).convert("L") for path in grids]
side, gap = 2 * pieces[0].width, 12
figure = Image.new("L", (len(pieces) * (side + gap) - gap, side + 24), 255)
for i, (path, piece) in enumerate(zip(grids, pieces)):
    step = int(re.search(r"\d+", path.stem)[0])
    ImageDraw.Draw(figure).text((i * (side + gap), 0), f"step {step}", 0, ImageFont.load_default(16))
    figure.paste(piece.resize((side, side), Image.Resampling.NEAREST), (i * (side + gap), 24))
figure.save(Path(__file__).parent.parent / "assets/glyphs.png")
