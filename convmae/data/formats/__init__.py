"""Files of single pictures, whatever their format: what each holds, and its pixels."""
