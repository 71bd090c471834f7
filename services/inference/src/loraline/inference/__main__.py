"""`python -m loraline.inference`: serve the stage alone, with the settings of the environment."""

from loraline.core.serving.server import run
from loraline.inference.component import build

# vLLM starts its processes anew from this module; only the first one is the server.
if __name__ == "__main__":
    run([build])
