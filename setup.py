"""Installs dropmae_jax and tfds_kinetics; `make venv` does it with the tested versions."""

from setuptools import setup

setup(
  name='dropmae_jax',
  version='0.1.0',
  description='DropMAE in JAX: masked autoencoding of frame pairs with attention dropout',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=['dropmae_jax', 'tfds_kinetics', 'configs'],
  py_modules=['convert_to_torch'],
  install_requires=[
    'absl-py',
    'array-record>=0.8.6',
    'av>=14',
    'dm-pix>=0.4.5',
    'einops>=0.8',
    'flax>=0.12.8',
    'grain>=0.2.18',
    'jax>=0.10.2',
    'jaxtyping>=0.3',
    'ml-collections>=1.1',
    'numpy>=2',
    'opencv-python-headless>=4.10,<6',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'pillow>=10',
    'safetensors>=0.5',
    'simplejpeg>=1.8',
    'tensorboard>=2.19',
    'tensorflow-datasets>=4.9.10',
    'tqdm>=4.66',
  ],
  extras_require={
    'cuda': ['jax[cuda]>=0.10.2'],
    'tpu': ['jax[tpu]>=0.10.2'],
    'torch': ['torch>=2.6'],
    'beam': ['apache-beam>=2.77'],
    'dev': [
      'beartype>=0.22',
      'hypothesis>=6.100',
      'pytest>=8',
      'ruff>=0.9',
      'scipy>=1.13',
      'timm>=1.0',
    ],
  },
)
