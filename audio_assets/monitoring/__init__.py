"""Whether the product does well: findings, metrics, and the page that tells of both."""
