"""`python -m loraline.datagen` serves the stage alone."""

from loraline.core.serving.server import run
from loraline.datagen.component import build

if __name__ == "__main__":
    run([build])
