"""visionq, GPU side: Celery workers that each hold one warm vision-language model."""
