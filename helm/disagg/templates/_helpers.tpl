{{/* Name of everything the release owns. KubeRay appends up to 20 characters to it. */}}
{{- define "disagg.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- $full | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{/* Labels that select the release's Ray pods. KubeRay overwrites app.kubernetes.io/name, so it is not one. */}}
{{- define "disagg.selectorLabels" -}}
app.kubernetes.io/part-of: disagg
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "disagg.labels" -}}
{{ include "disagg.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* Every Ray pod and nothing else: hooks and placeholders are the release's too. */}}
{{- define "disagg.podSelector" -}}
matchLabels:
  {{- include "disagg.selectorLabels" . | nindent 2 }}
matchExpressions:
  - key: app.kubernetes.io/component
    operator: In
    values: [head, frontend, prefill, decode]
{{- end }}

{{/* image: (dict "root" $ "override" pool.image) */}}
{{- define "disagg.image" -}}
{{- $image := .root.Values.image -}}
{{- $override := .override | default dict -}}
{{- $repository := default $image.repository $override.repository -}}
{{- if $override.tag -}}
{{- printf "%s:%s" $repository $override.tag -}}
{{- else if and $image.digest (not $override.repository) -}}
{{- printf "%s@%s" $repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (default .root.Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end }}

{{- define "disagg.serviceAccountName" -}}
{{- if .Values.serviceAccount.name -}}
{{- .Values.serviceAccount.name -}}
{{- else -}}
{{- ternary (include "disagg.fullname" .) "default" .Values.serviceAccount.create -}}
{{- end -}}
{{- end }}

{{- define "disagg.apiKeySecret" -}}
{{- default (printf "%s-api-key" (include "disagg.fullname" .)) .Values.apiKey.existingSecret -}}
{{- end }}

{{- define "disagg.cacheClaim" -}}
{{- default (printf "%s-models" (include "disagg.fullname" .)) .Values.model.cache.existingClaim -}}
{{- end }}

{{/* The service that KubeRay makes for HTTP, and points at the cluster that serves. */}}
{{- define "disagg.serveService" -}}
{{- printf "%s-serve-svc" (include "disagg.fullname" .) -}}
{{- end }}

{{/* Where every pod finds the checkpoint; empty: the bundled model. */}}
{{- define "disagg.modelPath" -}}
{{- $model := .Values.model -}}
{{- if eq $model.source "volume" -}}
{{- printf "%s/%s" $model.cache.mountPath (trimPrefix "/" $model.path) -}}
{{- else if eq $model.source "hub" -}}
{{- printf "%s/%s/%s" $model.cache.mountPath $model.hub.repository ($model.hub.revision | replace "/" "_") -}}
{{- end -}}
{{- end }}

{{- define "disagg.priorityClass" -}}
{{- default (printf "%s-placeholder" (include "disagg.fullname" .)) .Values.warmCapacity.priorityClass.name -}}
{{- end }}

{{/* What the schema can't say, since it sees one value at a time. */}}
{{- define "disagg.validate" -}}
{{- range $name := list "prefill" "decode" -}}
{{- $pool := index $.Values $name -}}
{{- $min := include "disagg.minReplicas" $pool | int -}}
{{- $max := include "disagg.maxReplicas" $pool | int -}}
{{- if gt $min (int $pool.replicas) -}}
{{- fail (printf "%s.minReplicas (%d) must not be above %s.replicas (%d)" $name $min $name (int $pool.replicas)) -}}
{{- end -}}
{{- if lt $max (int $pool.replicas) -}}
{{- fail (printf "%s.maxReplicas (%d) must not be below %s.replicas (%d)" $name $max $name (int $pool.replicas)) -}}
{{- end -}}
{{- if and (gt (int $pool.tensorParallelSize) 1) (not $pool.gpu.enabled) -}}
{{- fail (printf "%s.tensorParallelSize is %d, which needs %s.gpu.enabled=true" $name (int $pool.tensorParallelSize) $name) -}}
{{- end -}}
{{- end -}}
{{- $degree := max (int .Values.prefill.tensorParallelSize) (int .Values.decode.tensorParallelSize) -}}
{{- if and .Values.model.quantization (gt $degree 1) -}}
{{- fail (printf "model.quantization=%s needs tensorParallelSize 1 in both pools" .Values.model.quantization) -}}
{{- end -}}
{{- if lt (float64 .Values.router.deadAfterSeconds) (mulf 2.0 (float64 .Values.router.heartbeatSeconds)) -}}
{{- fail "router.deadAfterSeconds must be at least twice router.heartbeatSeconds, or every late report loses a worker" -}}
{{- end -}}
{{- if and .Values.autoscaler.enabled (not .Values.ray.autoscaler.enabled) -}}
{{- fail "autoscaler.enabled needs ray.autoscaler.enabled=true, or no pod comes for a new worker" -}}
{{- end -}}
{{- if and .Values.tls.enabled (has .Values.transfer.kvTransport (list "nccl" "nixl")) -}}
{{- fail (printf "transfer.kvTransport=%s would send KV unencrypted beside tls.enabled=true; use grpc" .Values.transfer.kvTransport) -}}
{{- end -}}
{{- if eq .Values.frontend.port .Values.frontend.grpcPort -}}
{{- fail "frontend.port and frontend.grpcPort must differ" -}}
{{- end -}}
{{- end }}

{{- define "disagg.minReplicas" -}}
{{- ternary .replicas .minReplicas (kindIs "invalid" .minReplicas) -}}
{{- end }}

{{- define "disagg.maxReplicas" -}}
{{- ternary .replicas .maxReplicas (kindIs "invalid" .maxReplicas) -}}
{{- end }}
