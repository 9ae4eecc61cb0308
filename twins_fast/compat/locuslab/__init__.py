"""The attacks of fast_adversarial and robust_overfitting (https://github.com/locuslab): ``attack_pgd`` of each."""
