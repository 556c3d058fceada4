"""What a recipe is for."""
