"""Installs dropmae_jax and tfds_kinetics; `make venv` does it with the tested versions."""

from setuptools import find_packages, setup

# JAX and its extras must have the same version.
JAX = '>=0.10.2,<0.13'
# Of the extra gcs, and of the tests.
GCS = 'gcsfs>=2026.9,<2027'

setup(
  name='dropmae_jax',
  version='0.1.0',
  description='DropMAE in JAX: masked autoencoding of frame pairs with attention dropout',
  license='Apache-2.0',
  python_requires='>=3.11',
  # Includes dropmae_jax.configs, a symbolic link to configs/.
  packages=find_packages(include=['dropmae_jax', 'dropmae_jax.*', 'tfds_kinetics']),
  entry_points={
    'console_scripts': [
      'dropmae-build = tfds_kinetics.__main__:command',
      'dropmae-clips = dropmae_jax.data.synthetic_clips:command',
      'dropmae-convert = dropmae_jax.pytorch.main:command',
      'dropmae-evaluate = dropmae_jax.evaluation.evaluate:command',
      'dropmae-figures = dropmae_jax.evaluation.reconstruction:command',
      'dropmae-inspect = dropmae_jax.evaluation.pair_sheet:command',
      'dropmae-tracker = dropmae_jax.tracking.main:command',
      'dropmae-train = dropmae_jax.main:command',
    ]
  },
  # Upper bounds: the first major release (of 0.x, minor release) that was not tested.
  install_requires=[
    'absl-py>=2,<3',
    'array-record>=0.8.6,<0.9',
    'av>=14.1,<20',
    'einops>=0.8,<0.9',
    'etils[epath]>=1.15,<2',
    'flax>=0.12.8,<0.13',
    'grain>=0.2.18,<0.3',
    f'jax{JAX}',
    'jaxtyping>=0.3,<0.4',
    'ml-collections>=1.1,<2',
    'numpy>=2,<3',
    'opencv-python-headless>=4.10,<6',
    'optax>=0.2.8,<0.3',
    'orbax-checkpoint>=0.12.8,<0.13',
    'pillow>=10.1,<14',
    'safetensors>=0.5,<0.9',
    'scipy>=1.14,<2',
    'simplejpeg>=1.8,<2',
    'tensorboard>=2.19,<3',
    'tensorflow-datasets>=4.9.10,<5',
    'tqdm>=4.66,<5',
  ],
  extras_require={
    'cuda': [f'jax[cuda]{JAX}'],
    'tpu': [f'jax[tpu]{JAX}'],
    'torch': ['torch>=2.6,<3'],
    'gcs': [GCS],
    's3': ['s3fs>=2026.9,<2027'],
    # For the tests, if PyTorch is installed.
    'timm': ['timm>=1.0,<2'],
    'beam': ['apache-beam>=2.77,<3'],
    'dev': [
      'beartype>=0.22.1,<0.24',
      'dm-pix>=0.4.5,<0.5',
      GCS,
      'got10k>=0.1.3,<0.2',
      'hypothesis>=6.100,<7',
      'pytest>=8,<10',
      'pytest-xdist>=3.6,<4',
      'ruff>=0.9,<0.18',
      'six>=1.16,<2',  # got10k imports it, but does not declare it.
    ],
  },
)
