"""Vectors, rows and files: what an index is, how it is searched and how it is kept on disk.

Nothing here knows the model. Importing this package does not load pyarrow; its modules do when they
need it:

- `errors`: every error of the project.
- `base`: the contract of an index; `exact` (numpy, the oracle) and `bounded` fulfil it.
- `store`: images and their features on disk, in Parquet; `stored` opens them as an index.
"""
