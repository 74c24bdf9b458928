"""Draw one logged reward group for the README: python docs/group.py RUN STEP PROMPT_INDEX OUT.png"""
import sys
import textwrap

import matplotlib
import matplotlib.pyplot as plt
from PIL import Image

import unify_rl
from unify_rl.train.runlog import picture_path

matplotlib.use("Agg")
folder, step, index, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
group = unify_rl.Run(folder).groups(step)
group = group[group.prompt_index == index].sort_values("reward", ascending=False)
fig, (pictures, bars) = plt.subplots(2, len(group), figsize=(1.3 * len(group), 3), height_ratios=(3, 2), dpi=90)
for top, low, (_, row) in zip(pictures, bars, group.iterrows()):
    top.imshow(Image.open(picture_path(folder, row.image)))
    top.set_title("\n".join(textwrap.wrap(row.reason_strict, 20)[:2]), fontsize=6.5)
    low.bar(["reward", "advantage"], [row.reward, row.advantage], color=["0.7", "tab:green" if row.advantage > 0 else "tab:red"])
    low.set_ylim(-2.2, 2.2)
    low.axhline(0, color="k", lw=0.5)
    low.tick_params(labelsize=6)
    top.set_xticks([])
    top.set_yticks([])
    if low is not bars[0]: low.set_yticks([])
fig.suptitle(f"“{group.prompt.iloc[0]}”, step {step}", fontsize=10)
fig.tight_layout()
fig.savefig(out)
