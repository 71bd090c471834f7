"""`python -m loraline.trainer`: the trainer as a server of its own."""

from loraline.core.serving.server import run
from loraline.trainer.component import build

if __name__ == "__main__":
    run([build])
