{{/* Whole cores of a Kubernetes CPU quantity: "2", 2, "1500m". At least 1. */}}
{{- define "disagg.wholeCores" -}}
{{- $text := . | toString -}}
{{- if hasSuffix "m" $text -}}
{{- max 1 (div (trimSuffix "m" $text | int64) 1000) -}}
{{- else -}}
{{- max 1 (float64 $text | floor | int64) -}}
{{- end -}}
{{- end }}

{{/* Compute threads of one worker: the program would share out the cores of the node that the controller is on. */}}
{{- define "disagg.threads" -}}
{{- if .threads -}}
{{- .threads -}}
{{- else -}}
{{- $limits := .resources.limits | default dict -}}
{{- $requests := .resources.requests | default dict -}}
{{- include "disagg.wholeCores" (default (default 1 $requests.cpu) $limits.cpu) -}}
{{- end -}}
{{- end }}

{{/* One pool of `disagg serve --config`. Takes (dict "name" "prefill" "pool" .Values.prefill). */}}
{{- define "disagg.poolConfig" -}}
{{- $pool := .pool -}}
replicas: {{ $pool.replicas }}
min_replicas: {{ include "disagg.minReplicas" $pool }}
max_replicas: {{ include "disagg.maxReplicas" $pool }}
tensor_parallel_size: {{ $pool.tensorParallelSize }}
threads: {{ include "disagg.threads" $pool }}
pin_threads: {{ $pool.pinThreads }}
{{- with $pool.maxNumBatchedTokens }}
max_num_batched_tokens: {{ . | int64 }}
{{- end }}
num_gpus: {{ ternary $pool.tensorParallelSize 0 $pool.gpu.enabled }}
# Each pod of the group offers one of these, so a worker starts there and nowhere else.
resources: {disagg_{{ .name }}: 1}
{{- end }}

{{/* The keys of `disagg serve --config`. */}}
{{- define "disagg.config" -}}
{{- $v := .Values -}}
model:
  {{- with include "disagg.modelPath" . }}
  path: {{ . | quote }}
  {{- end }}
  {{- if $v.model.servedModelName }}
  served_model_name: {{ $v.model.servedModelName | quote }}
  {{- else if eq $v.model.source "hub" }}
  served_model_name: {{ $v.model.hub.repository | quote }}
  {{- end }}
  dtype: {{ $v.model.dtype }}
  {{- with $v.model.maxModelLen }}
  max_model_len: {{ . | int64 }}
  {{- end }}
  {{- with $v.model.quantization }}
  quantization: {{ . }}
  {{- end }}
engine:
  block_size: {{ $v.engine.blockSize | int64 }}
  max_num_seqs: {{ $v.engine.maxNumSeqs | int64 }}
  max_num_batched_tokens: {{ $v.engine.maxNumBatchedTokens | int64 }}
  {{- $memory := $v.engine.kvCacheMemory | float64 }}
  kv_cache_memory: {{ if gt $memory 1.0 }}{{ $memory | int64 }}{{ else }}{{ $memory }}{{ end }}
  max_waiting: {{ $v.engine.maxWaiting | int64 }}
  enable_prefix_caching: {{ $v.engine.enablePrefixCaching }}
  kernels: {{ $v.engine.kernels }}
transfer:
  kv_transport: {{ $v.transfer.kvTransport }}
  lease_s: {{ $v.transfer.leaseSeconds }}
  pull_timeout_s: {{ $v.transfer.pullTimeoutSeconds }}
{{- if $v.tls.enabled }}
tls:
  certificate: /etc/disagg/tls/tls.crt
  key: /etc/disagg/tls/tls.key
  ca: /etc/disagg/tls/ca.crt
  mutual: {{ $v.tls.mutual }}
  server_name: {{ $v.tls.serverName | quote }}
{{- end }}
prefill:
  {{- include "disagg.poolConfig" (dict "name" "prefill" "pool" $v.prefill) | nindent 2 }}
decode:
  {{- include "disagg.poolConfig" (dict "name" "decode" "pool" $v.decode) | nindent 2 }}
{{- with $v.autoscaler }}
autoscaler:
  enabled: {{ .enabled }}
  max_workers: {{ .maxWorkers | int64 }}
  slo_ttft_s: {{ .sloTtftSeconds }}
  slo_tpot_s: {{ .sloTpotSeconds }}
  look_back_s: {{ .lookBackSeconds }}
  settle_s: {{ .settleSeconds }}
{{- end }}
router:
  policy: {{ $v.router.policy }}
  local_prefill: {{ $v.router.localPrefill }}
  heartbeat_s: {{ $v.router.heartbeatSeconds }}
  dead_after_s: {{ $v.router.deadAfterSeconds }}
  max_resumes: {{ $v.router.maxResumes }}
  # The head offers one; it is the one pod that no pool's scaling takes away.
  resources: {disagg_head: 0.01}
slo:
  ttft_s: {{ toJson $v.slo.ttftSeconds }}
  tpot_s: {{ toJson $v.slo.tpotSeconds }}
{{- with $v.admission }}
admission:
  enabled: {{ .enabled }}
  max_queue: {{ .maxQueue | int64 }}
  max_wait_s: {{ .maxWaitSeconds }}
  tier_max_wait_s: {{ toJson .tierMaxWaitSeconds }}
  backlog_s: {{ .backlogSeconds }}
  reserve: {{ .reserve }}
  tenant_weights: {{ toJson .tenantWeights }}
{{- end }}
frontend:
  replicas: {{ $v.frontend.replicas }}
  host: "0.0.0.0"
  port: {{ $v.frontend.port }}
  grpc_port: {{ $v.frontend.grpcPort }}
  max_body_bytes: {{ $v.frontend.maxBodyBytes | int64 }}
  request_timeout_s: {{ $v.frontend.requestTimeoutSeconds }}
  {{- if $v.apiKey.enabled }}
  api_key_file: /etc/disagg/secrets/api-key
  {{- end }}
  resources: {disagg_frontend: 1}
network:
  host: auto
{{- end }}

{{/* serveConfigV2. */}}
{{- define "disagg.serveConfig" -}}
{{- $config := include "disagg.config" . | fromYaml -}}
{{- if hasKey $config "Error" -}}
{{- fail (printf "the chart made no valid configuration: %s" $config.Error) -}}
{{- end -}}
{{- $config = mergeOverwrite $config (deepCopy .Values.extraConfig) -}}
proxy_location: EveryNode
http_options:
  host: "0.0.0.0"
  port: {{ .Values.frontend.port }}
logging_config:
  log_level: WARNING
  enable_access_log: false
applications:
  - name: disagg
    route_prefix: /
    import_path: disagg.frontend.app:build
    args:
      {{- toYaml $config | nindent 6 }}
{{- end }}
