"""What every command needs: command lines, errors, files, logs, several processes."""
