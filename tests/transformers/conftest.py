"""The files of this folder are run by name (`make test-transformers`): they need the source package of transformers."""
