"""Varied values, each of which must give valid objects: one per option, and combinations that interact."""

from __future__ import annotations

from typing import Any

_GPU = {"enabled": True, "product": "NVIDIA-H100-80GB-HBM3"}
_MONITORS = {
    name: {"enabled": True} for name in ("serviceMonitor", "podMonitor", "prometheusRule", "dashboards")
}

VARIED: dict[str, dict[str, Any]] = {
    "defaults": {},
    "full name": {"fullnameOverride": "llm-in-production-with-a-name-of-forty-c"},
    "name": {"nameOverride": "tiny"},
    "image by digest": {"image": {"digest": "sha256:" + "0" * 64, "pullSecrets": ["registry", "other"]}},
    "image of a pool": {
        "prefill": {"image": {"repository": "cuda", "tag": "1"}},
        "decode": {"image": {"tag": "2"}},
    },
    "model from the hub": {"model": {"source": "hub", "hub": {"repository": "Qwen/Qwen3-0.6B"}}},
    "gated model": {
        "model": {
            "source": "hub",
            "hub": {
                "repository": "meta-llama/Llama-3.1-8B",
                "revision": "refs/pr/1",
                "token": {"existingSecret": "hub"},
            },
            "cache": {"type": "emptyDir", "size": "30Gi"},
        }
    },
    "model on a volume": {
        "model": {"source": "volume", "path": "qwen3", "cache": {"existingClaim": "weights"}}
    },
    "model on a new volume": {
        "model": {
            "source": "volume",
            "path": "a/b",
            "servedModelName": "mine",
            "dtype": "bfloat16",
            "maxModelLen": 32768,
            "quantization": "int8",
            "cache": {
                "storageClassName": "nfs",
                "accessModes": ["ReadOnlyMany"],
                "mountPath": "/data/models",
            },
        }
    },
    "engine": {"engine": {"blockSize": 32, "maxNumSeqs": 256, "kvCacheMemory": 0.85, "kernels": "torch"}},
    "a large cache in bytes": {"engine": {"kvCacheMemory": 137438953472, "enablePrefixCaching": False}},
    "transfer": {"transfer": {"kvTransport": "grpc", "leaseSeconds": 2.5, "pullTimeoutSeconds": 30}},
    "tls": {"tls": {"enabled": True, "existingSecret": "disagg-tls"}},
    "many workers": {"prefill": {"replicas": 4}, "decode": {"replicas": 8}},
    "replica bounds": {"prefill": {"replicas": 2, "minReplicas": 1, "maxReplicas": 9}},
    "gpus": {"prefill": {"gpu": _GPU}, "decode": {"gpu": {"enabled": True, "resourceName": "amd.com/gpu"}}},
    "tensor parallel": {"prefill": {"gpu": _GPU, "tensorParallelSize": 4}},
    "node selection": {
        "prefill": {
            "gpu": _GPU,
            "nodeSelector": {"pool": "fast"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
        }
    },
    "kept in a zone": {
        "prefill": {"topology": {"colocateBy": "topology.kubernetes.io/zone", "colocateRequired": True}},
        "decode": {"topology": {"colocateBy": "topology.kubernetes.io/zone", "spreadRequired": True}},
    },
    "own affinity": {
        "decode": {
            "affinity": {
                "nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {
                        "nodeSelectorTerms": [{"matchExpressions": [{"key": "disk", "operator": "Exists"}]}]
                    }
                }
            }
        }
    },
    "not spread": {name: {"topology": {"spreadBy": ""}} for name in ("frontend", "prefill", "decode")},
    "pod settings": {
        "decode": {
            "runtimeClassName": "nvidia",
            "priorityClassName": "serving",
            "terminationGracePeriodSeconds": 5,
            "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
            "podAnnotations": {"a": "b"},
            "podLabels": {"team": "llm"},
            "shmSize": "16Gi",
            "tmpSize": "1Gi",
        }
    },
    "objectives and admission": {
        "slo": {"ttftSeconds": 1, "tpotSeconds": 0.05},
        "admission": {
            "maxQueue": 64,
            "maxWaitSeconds": 5,
            "tierMaxWaitSeconds": {"flex": 300, "priority": 2.5},
            "backlogSeconds": 0,
            "reserve": 0.5,
            "tenantWeights": {"acme": 3},
        },
    },
    "no admission": {"admission": {"enabled": False}},
    "threads": {"prefill": {"threads": 7, "pinThreads": True, "maxNumBatchedTokens": 4096}},
    "cpu in thousandths": {
        "decode": {"resources": {"requests": {"cpu": "1500m"}, "limits": {"cpu": "2500m"}}}
    },
    "no limits": {"decode": {"resources": {"requests": {"cpu": 3, "memory": "8Gi"}, "limits": None}}},
    "router": {
        "router": {"policy": "round_robin", "heartbeatSeconds": 1, "deadAfterSeconds": 5, "maxResumes": 0}
    },
    "ports": {"frontend": {"port": 18000, "grpcPort": 19000, "replicas": 5, "readinessPath": "/ready"}},
    "load balancer": {
        "frontend": {"serviceType": "LoadBalancer", "serviceAnnotations": {"cloud.example/internal": "true"}}
    },
    "ingress": {
        "frontend": {
            "ingress": {
                "enabled": True,
                "className": "nginx",
                "host": "llm.example.com",
                "tlsSecret": "llm-tls",
                "annotations": {"nginx.ingress.kubernetes.io/proxy-buffering": "off"},
            }
        }
    },
    "http route": {
        "frontend": {
            "httpRoute": {
                "enabled": True,
                "parentRefs": [{"name": "public", "namespace": "gateways"}],
                "hostnames": ["llm.example.com"],
            }
        }
    },
    "no api key": {"apiKey": {"enabled": False}},
    "own api key": {"apiKey": {"existingSecret": "key", "key": "the.key"}},
    "no ray token": {"ray": {"tokenAuth": {"enabled": False}}},
    "own ray token": {"ray": {"tokenAuth": {"existingSecret": "ray-token"}}},
    "upgrade in steps": {
        "ray": {"upgrade": {"type": "NewClusterWithIncrementalUpgrade", "gatewayClassName": "istio"}}
    },
    "no upgrades": {"ray": {"upgrade": {"type": "None", "deletionDelaySeconds": 0}}},
    "autoscaler": {"ray": {"autoscaler": {"enabled": True}}, "decode": {"maxReplicas": 4}},
    "our autoscaler": {
        "autoscaler": {"enabled": True, "maxWorkers": 12, "sloTtftSeconds": 0.5},
        "ray": {"autoscaler": {"enabled": True}},
        "decode": {"maxReplicas": 8},
    },
    "redis": {
        "ray": {
            "gcsFaultTolerance": {
                "enabled": True,
                "redis": {"address": "redis:6379", "existingSecret": "redis"},
            }
        }
    },
    "redis with tls and a user": {
        "ray": {
            "gcsFaultTolerance": {
                "enabled": True,
                "redis": {"address": "rediss://redis.example.com:6380", "username": "ray"},
            }
        },
        "networkPolicy": {"redis": [{"ipBlock": {"cidr": "192.0.2.1/32"}}]},
    },
    "rocksdb": {
        "ray": {
            "gcsFaultTolerance": {
                "enabled": True,
                "backend": "rocksdb",
                "rocksdb": {"storageClassName": "ssd"},
            }
        }
    },
    "service account": {"serviceAccount": {"create": False, "name": "mine"}},
    "default service account": {"serviceAccount": {"create": False}},
    "no network policy": {"networkPolicy": {"enabled": False}},
    "closed network policy": {"networkPolicy": {"clients": [], "prometheus": [], "operator": []}},
    "more egress": {
        "networkPolicy": {
            "extraEgress": [{"to": [{"ipBlock": {"cidr": "192.0.2.0/24"}}], "ports": [{"port": 4317}]}],
            "apiServer": [{"ipBlock": {"cidr": "192.0.2.9/32"}}],
        },
        "ray": {"autoscaler": {"enabled": True}},
    },
    "metrics": {"metrics": _MONITORS},
    "metrics without a key": {"metrics": _MONITORS, "apiKey": {"enabled": False}},
    "metrics with labels": {
        "metrics": {
            "interval": "1m",
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "dashboards": {"enabled": True, "annotations": {"folder": "LLM"}},
        }
    },
    "warm capacity": {"prefill": {"warmCapacity": {"enabled": True, "replicas": 2}, "gpu": _GPU}},
    "warm capacity by KEDA": {
        "decode": {
            "warmCapacity": {
                "enabled": True,
                "maxReplicas": 3,
                "kedaTriggers": [{"type": "cron", "metadata": {"timezone": "UTC", "start": "0 7 * * *"}}],
            }
        },
        "warmCapacity": {"priorityClass": {"create": False, "name": "low"}},
    },
    "disruption budgets": {
        "frontend": {"podDisruptionBudget": {"enabled": False}},
        "decode": {"podDisruptionBudget": {"maxUnavailable": "25%"}},
    },
    "further configuration": {
        "extraConfig": {"transfer": {"chunk_bytes": 1048576}, "engine": {"num_kv_blocks": 99}}
    },
    "openshift": {
        "podSecurityContext": {"runAsNonRoot": True},
        "securityContext": {"readOnlyRootFilesystem": True},
    },
}

# (values, what the message must say)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"prefil": {}}, "Additional property prefil is not allowed"),
    "unknown key in a pool": (
        {"prefill": {"replica": 2}},
        "prefill: Additional property replica is not allowed",
    ),
    "wrong type": (
        {"decode": {"replicas": "two"}},
        "decode.replicas: Invalid type. Expected: integer, given: string",
    ),
    "no workers": ({"prefill": {"replicas": 0}}, "prefill.replicas: Must be greater than or equal to 1"),
    "half a worker": (
        {"decode": {"replicas": 1.5}},
        "decode.replicas: Invalid type. Expected: integer, given: number",
    ),
    "bounds below": (
        {"decode": {"replicas": 2, "maxReplicas": 1}},
        "decode.maxReplicas (1) must not be below decode.replicas (2)",
    ),
    "bounds above": (
        {"prefill": {"replicas": 2, "minReplicas": 3}},
        "prefill.minReplicas (3) must not be above prefill.replicas (2)",
    ),
    "tensor parallel without gpus": (
        {"decode": {"tensorParallelSize": 2}},
        "decode.tensorParallelSize is 2, which needs decode.gpu.enabled=true",
    ),
    "unknown source": ({"model": {"source": "s3"}}, "model.source must be one of the following"),
    "hub without a repository": ({"model": {"source": "hub"}}, "model.hub.repository: String length must be"),
    "a repository that is a URL": (
        {"model": {"source": "hub", "hub": {"repository": "https://example.com/x"}}},
        "model.hub.repository: Does not match pattern",
    ),
    "volume without a path": ({"model": {"source": "volume"}}, "model.path: String length must be"),
    "unknown dtype": ({"model": {"dtype": "float8"}}, "model.dtype must be one of the following"),
    "unknown quantization": (
        {"model": {"quantization": "int2"}},
        "model.quantization must be one of the following",
    ),
    "a cache of a few bytes": ({"engine": {"kvCacheMemory": 2}}, "engine.kvCacheMemory"),
    "no cache": ({"engine": {"kvCacheMemory": 0}}, "engine.kvCacheMemory"),
    "unknown transport": ({"transfer": {"kvTransport": "pigeon"}}, "transfer.kvTransport must be one of"),
    "a lease of nothing": (
        {"transfer": {"leaseSeconds": 0}},
        "transfer.leaseSeconds: Must be greater than 0",
    ),
    "tls without certificates": ({"tls": {"enabled": True}}, "tls.existingSecret: String length must be"),
    "kv in the clear beside tls": (
        {"tls": {"enabled": True, "existingSecret": "certs"}, "transfer": {"kvTransport": "nccl"}},
        "transfer.kvTransport=nccl would send KV unencrypted beside tls.enabled=true; use grpc",
    ),
    "quantized ranks": (
        {
            "model": {"quantization": "int8"},
            "prefill": {"tensorParallelSize": 2, "gpu": {"enabled": True}},
        },
        "model.quantization=int8 needs tensorParallelSize 1 in both pools",
    ),
    "no queue": ({"admission": {"maxQueue": 0}}, "admission.maxQueue: Must be greater than or equal to 1"),
    "all in reserve": ({"admission": {"reserve": 1}}, "admission.reserve: Must be less than 1"),
    "an unknown tier": ({"admission": {"tierMaxWaitSeconds": {"vip": 1}}}, "vip"),
    "an objective of nothing": ({"slo": {"ttftSeconds": 0}}, "slo.ttftSeconds: Must be greater than 0"),
    "our autoscaler alone": (
        {"autoscaler": {"enabled": True}},
        "autoscaler.enabled needs ray.autoscaler.enabled=true",
    ),
    "unknown policy": ({"router": {"policy": "random"}}, "router.policy must be one of"),
    "dead before late": (
        {"router": {"heartbeatSeconds": 5}},
        "router.deadAfterSeconds must be at least twice router.heartbeatSeconds",
    ),
    "one port for both": (
        {"frontend": {"port": 8000, "grpcPort": 8000}},
        "frontend.port and frontend.grpcPort must differ",
    ),
    "a privileged port": ({"frontend": {"port": 80}}, "frontend.port: Must be greater than or equal to 1024"),
    "no front end": ({"frontend": {"replicas": 0}}, "frontend.replicas: Must be greater than or equal to 1"),
    "unknown readiness": ({"frontend": {"readinessPath": "/"}}, "frontend.readinessPath must be one of"),
    "ingress without a host": (
        {"frontend": {"ingress": {"enabled": True}}},
        "frontend.ingress.host: String length",
    ),
    "route without a gateway": (
        {"frontend": {"httpRoute": {"enabled": True}}},
        "frontend.httpRoute.parentRefs: Array must have at least 1 items",
    ),
    "key as text": ({"apiKey": "sesame"}, "apiKey: Invalid type. Expected: object, given: string"),
    "key in the values": (
        {"apiKey": {"value": "sesame"}},
        "apiKey: Additional property value is not allowed",
    ),
    "redis without an address": (
        {"ray": {"gcsFaultTolerance": {"enabled": True}}},
        "ray.gcsFaultTolerance.redis.address: String length must be",
    ),
    "redis without a port": (
        {"ray": {"gcsFaultTolerance": {"enabled": True, "redis": {"address": "redis"}}}},
        "ray.gcsFaultTolerance.redis.address: Does not match pattern",
    ),
    "steps without a gateway": (
        {"ray": {"upgrade": {"type": "NewClusterWithIncrementalUpgrade"}}},
        "ray.upgrade.gatewayClassName: String length must be",
    ),
    "unknown upgrade": ({"ray": {"upgrade": {"type": "Rolling"}}}, "ray.upgrade.type must be one of"),
    "a long name": (
        {"fullnameOverride": "a" * 41},
        "fullnameOverride: String length must be less than or equal to 40",
    ),
    "a name with capitals": ({"fullnameOverride": "Disagg"}, "fullnameOverride: Does not match pattern"),
    "a peer that is none": (
        {"networkPolicy": {"clients": [{"cidr": "0.0.0.0/0"}]}},
        "networkPolicy.clients.0: Additional property cidr is not allowed",
    ),
    "an empty peer": (
        {"networkPolicy": {"clients": [{}]}},
        "networkPolicy.clients.0: Must have at least 1 properties",
    ),
    "memory without a unit that exists": (
        {"decode": {"resources": {"limits": {"memory": "4GB"}}}},
        "decode.resources.limits.memory: Does not match pattern",
    ),
    "digest": ({"image": {"digest": "latest"}}, "image.digest: Does not match pattern"),
    "placeholders that win": (
        {"warmCapacity": {"priorityClass": {"value": 10}}},
        "warmCapacity.priorityClass.value: Must be less than or equal to 0",
    ),
}
