"""Post-training methods that read text or solve for codes: GPTQ, AWQ, HQQ and the like."""
