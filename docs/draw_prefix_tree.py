"""Draw `prefix_tree.png` of prefix_sharing.md: four rows, the tree they make, and its mask, from the packing code.

python docs/draw_prefix_tree.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from negtune.models.tree import Cost, pack_trees

ROWS = [
    "What is 7 x 8 ? 7 x 8 = 56 .",
    "What is 7 x 8 ? 7 x 8 = 54 .",
    "What is 7 x 8 ? It is 15 .",
    "Who wrote it ? Ada .",
]
COLOURS = ["#4878a8", "#c44e52", "#8172b2", "#55a868"]
SHARED = "#888888"


def main() -> None:
    words = sorted({word for row in ROWS for word in row.split()})
    rows = [[words.index(word) + 1 for word in row.split()] for row in ROWS]
    packed = pack_trees(rows, Cost(1.0, 0.0))
    mask, width = packed.mask()[0, 0], packed.input_ids.shape[1]
    names = [words[i - 1] for i in packed.input_ids[0].tolist()]
    users = [{b for b in range(len(rows)) if place in packed.places[b].tolist()} for place in range(width)]
    colours = [SHARED if len(rows_) > 1 else COLOURS[min(rows_)] for rows_ in users]

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), width_ratios=[1.25, 1])
    for place, name in enumerate(names):
        depth = packed.position_ids[0, place].item()
        height = -min(users[place])
        left.text(
            depth,
            height,
            name,
            ha="center",
            va="center",
            color="white",
            fontsize=9,
            family="monospace",
            bbox={"boxstyle": "round,pad=0.35", "color": colours[place]},
        )
        parents = [p for p in range(place) if mask[place, p] and packed.position_ids[0, p].item() == depth - 1]
        for parent in parents:
            left.plot([depth - 1, depth], [-min(users[parent]), height], color="#cccccc", zorder=0)
    left.set_xlim(-0.7, packed.position_ids.max().item() + 0.7)
    left.set_ylim(-len(rows) + 0.4, 0.6)
    left.set_xlabel("position")
    left.set_yticks(range(0, -len(rows), -1), [f"row {b}" for b in range(len(rows))])
    left.set_title(f"{sum(map(len, rows))} tokens in {len(rows)} rows, {packed.tokens} to compute")
    for side in ("top", "right", "left"):
        left.spines[side].set_visible(False)

    for query in range(width):
        for key in range(width):
            if mask[query, key]:
                right.add_patch(plt.Rectangle((key, query), 1, 1, color=colours[query], ec="white", lw=0.5))
    right.set_xlim(0, width)
    right.set_ylim(width, 0)
    right.set_aspect("equal")
    ticks = [place + 0.5 for place in range(width)]
    right.set_xticks(ticks, names, rotation=90, fontsize=7, family="monospace")
    right.set_yticks(ticks, names, fontsize=7, family="monospace")
    right.tick_params(length=0)
    right.set_title("what each token attends to (a row of the mask)")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("prefix_tree.png"), dpi=110)


if __name__ == "__main__":
    main()
