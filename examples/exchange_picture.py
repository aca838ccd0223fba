"""Draw the README's pictures: what comes in, what was exchanged, what the fused model sees or makes.

python examples/exchange_picture.py RUN SAMPLE_ID BLOCK OUT.png
for example runs/demo/tokenfusion-seed0 000420 stage2.1 docs/images/exchange.png
or          runs/colour/tokenfusion-seed0 000460 dec4.0 docs/images/translation.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokenfusion.report import maps

SIZE, GAP, TITLE = (360, 270), 14, 30  # pixels


def main(run: Path, sample: str, block: str, out: Path) -> None:
    index = json.loads((run / "samples" / "index.json").read_text())
    arrays = np.load(run / "samples" / f"{sample}.npz")
    names, colours = index["modalities"], maps.palette([entry["color"] for entry in index.get("classes", [])])
    exchanged = maps.exchange_map(arrays[f"scores/{block}"], index["threshold"])
    below = maps.donor_below(exchanged)
    rows = []
    for m, name in enumerate(names):
        image = _enlarged(arrays[f"input/{name}"])
        marked = maps.overlay(image, exchanged[m], None if below is None else below[m])
        share = 100 * exchanged[m].mean()
        rows.append([(name, image), (f"{name}: {share:.0f} % of the tokens from the other stream", marked)])
    for row, title, key in ((rows[0], "prediction", "prediction/ensemble"), (rows[1], "truth", "target")):
        made = arrays[key]  # class ids, or an image
        row.append((title, made if made.ndim == 3 else maps.colour_labels(made, colours, index["ignore"])))
    _sheet(rows).save(out, optimize=True)


def _enlarged(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(SIZE, Image.Resampling.NEAREST))


def _sheet(rows: list[list[tuple[str, np.ndarray]]]) -> Image.Image:
    columns = len(rows[0])
    cell = (SIZE[0] + GAP, SIZE[1] + TITLE + GAP)
    sheet = Image.new("RGB", (columns * cell[0] + GAP, len(rows) * cell[1] + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for r, row in enumerate(rows):
        for c, (title, image) in enumerate(row):
            x, y = GAP + c * cell[0], GAP + r * cell[1]
            draw.text((x, y + 4), title, fill="#333333", font=font)
            sheet.paste(Image.fromarray(_enlarged(np.asarray(image))), (x, y + TITLE))
    return sheet


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
