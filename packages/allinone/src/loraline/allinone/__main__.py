"""`python -m loraline.allinone`: all stages in one process, with settings from the environment."""

from loraline.allinone.stages import builders
from loraline.core.serving.server import run

if __name__ == "__main__":
    run(builders())
