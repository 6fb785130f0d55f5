"""Health of the product: findings, metrics, alerts and the service that publishes them."""
