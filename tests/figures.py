"""
The README's pictures that are made from runs, by hand (the curve needs `pip install matplotlib`):

    python tests/figures.py --run=out/glyphs                       # assets/glyphs.png
    python tests/figures.py --text=input.txt --nanogpt=PATH        # assets/curve.png

glyphs: what a run drew from the same noise as it learned. curve: the validation loss of nanoGPT's setting for
laptops and of configs/shakespeare_char_cpu.py against the seconds since their commands were given, one after
the other.
"""

import re
import tempfile
from pathlib import Path

import benchmark
from PIL import Image, ImageDraw, ImageFont

from configurator import configure

ASSETS = Path(__file__).parent.parent / "assets"

run = ""  # a run of train_diffusion.py
text = ""  # tinyshakespeare's input.txt
nanogpt = ""  # a checkout


def glyphs():
    """Five of the grids that the run drew at its evaluations, side by side."""
    grids = sorted(Path(run, "samples").glob("*.png"))
    chosen = [grids[round(part * (len(grids) - 1))] for part in (0, 0.1, 0.2, 0.5, 1)]
    pieces = [Image.open(path).convert("L") for path in chosen]
    side, gap, font = 2 * pieces[0].width, 12, ImageFont.load_default(16)
    figure = Image.new("L", (len(pieces) * (side + gap) - gap, side + 24), 255)
    for i, (path, piece) in enumerate(zip(chosen, pieces)):
        left, step = i * (side + gap), int(re.search(r"\d+", path.stem)[0])
        ImageDraw.Draw(figure).text((left, 0), f"step {step}", 0, font)
        figure.paste(piece.resize((side, side), Image.Resampling.NEAREST), (left, 24))
    figure.save(ASSETS / "glyphs.png")


def curve():
    import matplotlib.pyplot as plt

    benchmark.nanogpt, benchmark.text = nanogpt, text
    with tempfile.TemporaryDirectory() as folder:
        how = benchmark.OURS + text
        # our tokens are ready as well
        benchmark.ours(f"{folder}/first", f"{how} --max_steps=1 --eval_batches=1")
        seconds, times, losses = benchmark.run_nanogpt(folder)
        start = seconds - sum(times) / 1e3
        theirs = [(start + sum(times[:step]) / 1e3, loss) for step, loss in losses.items()]
        seconds, rows = benchmark.ours(f"{folder}/ours", f"{how} --eval_interval=95 --eval_batches=12")
        start = seconds - rows[-1]["time"]
        mine = [(start + row["time"], row["val/loss"]) for row in rows if "val/loss" in row]
    plt.figure(figsize=(6, 3.2), layout="tight")
    for name, points, colour in (("nanoGPT", theirs, "tab:gray"), ("train_lm.py", mine, "tab:blue")):
        plt.plot(*zip(*points), marker="o", markersize=3, label=name, color=colour)
        print(name, [(round(x, 1), round(y, 3)) for x, y in points])
    plt.ylim(1.4, 2.6)
    plt.xlabel("seconds since the command, two CPU cores")
    plt.ylabel("validation loss")
    plt.grid(alpha=0.3)
    plt.legend()
    plt.savefig(ASSETS / "curve.png", dpi=120)


if __name__ == "__main__":
    configure(globals())
    glyphs() if run else curve()
