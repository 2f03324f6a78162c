# %% [markdown]
# # A trained network on $title
#
# The GEMMs run on the core, everything else in NumPy. As a script: `python3 classify.py [DEVICE]`;
# on the board `sudo -E python3 classify.py pynq`, because its registers are the kernel's.

# %%
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(HERE))

try:
    from fpga import open_device
except ImportError as error:  # an older Python, or no NumPy
    sys.exit(str(error))

import numpy as np
from fpga.images import load_images
from fpga.network.program import Program
from fpga.network.runner import Runner

# %%
# The one word to change: "pynq" is the board; "pynq-sim" simulates it under the pynq package,
# "csim" compiles the core with g++, "reference" needs NumPy alone.
DEVICE = "$device"

if "__file__" in globals() and len(sys.argv) > 1:
    DEVICE = sys.argv[1]

# %%
program = Program.load(HERE / "program")
images, labels = load_images(HERE / "program")

options = {}
if DEVICE.startswith("pynq"):
    options["board"] = "$board"
if DEVICE == "pynq":
    options["overlay"] = HERE / "overlay" / "dpgemm.bit"


def show(done, total):
    print(f"\r{done} of {total} images", end="" if done < total else "\n", flush=True)


with open_device(DEVICE, program.config, **options) as device:
    runner = Runner(program, device)
    begin = time.perf_counter()
    classes = runner.classify(images, progress=show)
    seconds = time.perf_counter() - begin

# %%
count = len(images)
right = classes == labels
names = [program.labels[c] if program.labels else str(c) for c in classes]
for index in range(min(8, count)):
    print(f"  image {index}: {names[index]}{'' if right[index] else '   (wrong)'}")
print(
    f"{DEVICE}: {100 * right.mean():.2f} % of {count} images right, {count / seconds:.1f} "
    f"images a second"
)
cycles = sum(step.cycles for step in runner.report.values())
moved = sum(step.bytes_moved for step in runner.report.values())
print(f"core cycles an image: {cycles / count:.0f}; bytes moved an image: {moved / count:.0f}")
for name, step in runner.report.items():
    print(f"  {name:24s} {step.cycles / count:10.0f} cycles {step.bytes_moved / count:10.0f} bytes")

# %%
# Pictures, where Matplotlib is there and this is a notebook.
if "__file__" not in globals():
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 8, figsize=(12, 3.5))
    for axis, image, name, good in zip(axes.flat, images, names, right):
        picture = np.moveaxis(image - image.min(), 0, -1) / max(np.ptp(image), 1e-6)
        axis.imshow(picture.squeeze(), cmap="gray")
        axis.set_title(name, color="black" if good else "red", fontsize=9)
        axis.axis("off")
    plt.tight_layout()
    plt.show()
