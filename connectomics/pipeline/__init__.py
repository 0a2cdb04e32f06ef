"""What the verbs do: one module for each verb, called by the command line, the front door and the scripts."""
