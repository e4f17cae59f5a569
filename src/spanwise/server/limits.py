"""How much a request may ask for. Sizes of texts are in characters."""

from __future__ import annotations

MAX_FIELDS = 256  # of one JSON object; more are certainly not ours
MAX_DEPTH = 64  # of JSON that is passed on: schemas, template variables

MAX_MESSAGES = 4096
MAX_PARTS = 1024  # of one message
MAX_CALLS = 128  # of one message
MAX_PROMPTS = 1024
MAX_PROMPT_TOKENS = 2**21  # more than any context
MAX_INPUTS = 2048  # of one embedding request
MAX_CHOICES = 64
MAX_SEQUENCES = 4096  # prompts times choices

MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKENS = 1024
MAX_BIASES = 1024
MAX_LOGPROBS = 20
MAX_CONSTRAINT_CHARACTERS = 128 << 10
MAX_TEMPLATE_CHARACTERS = 64 << 10
MAX_OPTIONS = 1024  # to choose an answer from

MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1
MAX_NAME_CHARACTERS = 512  # of users, keys and the like
MAX_SALT_CHARACTERS = 256
MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512

# Of error messages.
MAX_ERRORS = 10
MAX_ECHO_CHARACTERS = 200
