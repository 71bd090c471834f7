"""Publishes three versions of dataset/d with content of its own, and prints their numbers; a test runs several."""

import sys
import tempfile
from pathlib import Path

from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.config import CoreSettings
from loraline.core.db.database import Database

settings = CoreSettings()
database = Database(settings.database_url)
database.migrate()
library = ArtifactLibrary.open(settings, database)
for turn in range(3):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a").write_text(f"{sys.argv[1]}-{turn}")
        made = library.publish(2, "d", Path(folder))
    library.verify(made.ref)
    print(made.ref.version)
database.close()
