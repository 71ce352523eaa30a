"""What training on a video, or watching it, takes of memory: foretold, made to fit, and measured."""
