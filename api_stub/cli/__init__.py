"""The program `visionq`: jobs, operators' commands, the gateway and the local stack."""
