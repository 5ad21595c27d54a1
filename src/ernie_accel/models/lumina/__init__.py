"""What Lumina 2 and NewBie-image need to run through diffusers' attention dispatcher."""
