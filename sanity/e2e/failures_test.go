package e2e

func failureScenarios() []scenario { return nil }

func clusterScenarios() []scenario { return nil }
