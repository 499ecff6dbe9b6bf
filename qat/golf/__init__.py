"""The challenge's own formats: its .ptz file, train_gpt.py, the submission folder."""
