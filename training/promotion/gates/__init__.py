"""The gates that a challenger must pass before it is rolled out."""
