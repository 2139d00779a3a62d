"""Many pictures or videos from a file of jobs: resumable, each exactly once."""
