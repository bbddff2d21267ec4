"""What every command needs, whatever it computes."""
