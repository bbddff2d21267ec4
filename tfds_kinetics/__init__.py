"""Builds a TFDS dataset of JPEG frames from a folder tree of videos; needs no TensorFlow.

Imports nothing of dropmae_jax. Any project opens the result by plain
`tfds.data_source('kinetics_frames/folder', split='train', data_dir=...)`.

The stages: tree.py lists the videos, video.py decodes them, shards.py writes shards of records,
workers.py (or beam.py) runs that in many processes, publish.py puts the dataset in place; build.py
calls them in this order.
"""
