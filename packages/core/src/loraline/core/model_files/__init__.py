"""The files of a model folder, read as data: nothing is loaded, nothing runs, whoever wrote them."""
