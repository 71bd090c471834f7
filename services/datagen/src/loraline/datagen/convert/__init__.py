"""Raw files, in the shapes people really have, to messages rows."""
