"""Following objects: through sequences side by side, a whole data set, or a video file."""
