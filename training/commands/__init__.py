"""The commands that training adds to `milonga`."""
