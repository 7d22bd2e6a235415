"""The node agent: captures pods and hands them to the tunnel."""
