"""Text from an exported model."""
