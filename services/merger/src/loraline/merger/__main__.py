"""`python -m loraline.merger`: serve the stage alone, with the settings of the environment."""

from loraline.core.serving.server import run
from loraline.merger.component import build

if __name__ == "__main__":
    run([build])
