"""The choices that come with the engine: a folder per hook point, a file per choice."""

if __name__ != "engine.plugins":
    raise ImportError("import engine.plugins; this folder is not importable by its bare name")
