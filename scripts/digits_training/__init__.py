"""What ``scripts/train_digits_image.py`` and ``scripts/train_digits_speech.py`` are made of."""
