"""Builds a TFDS dataset of JPEG frames from a folder tree of videos; needs no TensorFlow.

Stands alone: nothing of dropmae_jax is imported, and the result opens with plain
`tfds.data_source('kinetics_frames/folder', split='train', data_dir=...)` in any project.
"""
