"""What the project costs, and what it saves when things go wrong. See README.md."""
