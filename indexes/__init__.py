"""Vectors, rows and files: what an index is, how it is searched and how it is kept on disk.

Nothing here knows the model. Importing this package loads neither faiss nor pyarrow; its modules do
when they need them:

- `errors`: every error of the project.
- `base`: the contract of an index; `exact` (numpy), `flat` (FAISS) and `bounded` fulfil it.
- `store`: images and their features on disk, in Parquet.
"""
