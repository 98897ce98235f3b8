"""Every error that this project raises on purpose.

    Blip2SearchError
    ├── VectorIndexError        features or queries of a wrong shape, a bad k, too little memory
    └── StoreError              the index on disk cannot do what was asked
        ├── StoreMissingError   the folder holds no index
        ├── StoreCorruptError   a file of the index is missing, cut short or altered
        ├── StoreVersionError   the index was written in another version's layout
        ├── StoreLockedError    another process is writing to the index
        └── ModelMismatchError  the features were made by another model

The message is one sentence for the person at the keyboard, with the command that helps where there
is one: the command line prints it as it is.
"""


class Blip2SearchError(Exception):
    """The root: catch this to catch everything that the project raises on purpose."""


class VectorIndexError(Blip2SearchError):
    """Features or queries of a wrong shape, a bad k, or too little memory."""


class StoreError(Blip2SearchError):
    """The index on disk cannot do what was asked."""


class StoreMissingError(StoreError):
    """The folder holds no index."""


class StoreCorruptError(StoreError):
    """A file of the index is missing, cut short or altered."""


class StoreVersionError(StoreError):
    """The index was written in another version's layout."""


class StoreLockedError(StoreError):
    """Another process is writing to the index."""


class ModelMismatchError(StoreError):
    """The features were made by another model."""
