"""The embedded demo: generated tasks, a small pretrained backbone, and the run that `dpr-lightning demo` starts."""
