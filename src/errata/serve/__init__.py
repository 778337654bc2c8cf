"""The HTTP server: a model and its edits behind the OpenAI interface. Needs the extra ``serve``."""
