"""What every part uses: progress, the machine, files, checkpoints and memory."""
