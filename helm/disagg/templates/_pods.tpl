{{/* Probe command: `probe.py URL...` of files/. */}}
{{- define "disagg.rayletProbe" -}}
- python3
- -I
- /etc/disagg/scripts/probe.py
- --contains=success
- http://127.0.0.1:52365/api/local_raylet_healthz
{{- if eq .component "head" }}
- http://127.0.0.1:8265/api/gcs_healthz
{{- end }}
{{- end }}

{{/* Takes (dict "root" $ "path" "/ready"). */}}
{{- define "disagg.frontendProbe" -}}
- python3
- -I
- /etc/disagg/scripts/probe.py
{{- if .root.Values.apiKey.enabled }}
- --key-file=/etc/disagg/secrets/api-key
{{- end }}
- http://127.0.0.1:{{ .root.Values.frontend.port }}{{ .path }}
{{- end }}

{{/* Probes of one component. KubeRay's own ask each pod for a Serve proxy, which workers don't have. */}}
{{- define "disagg.probes" -}}
{{- if eq .component "frontend" -}}
# No traffic before a prefill and a decode worker have handed a block over.
startupProbe:
  exec:
    command: {{- include "disagg.frontendProbe" (dict "root" .root "path" "/ready") | nindent 6 }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: {{ div (add .root.Values.frontend.startupTimeoutSeconds 9) 10 }}
# A Serve application that is deployed anew is away for a minute; that must not restart the pod.
livenessProbe:
  exec:
    command: {{- include "disagg.frontendProbe" (dict "root" .root "path" "/health") | nindent 6 }}
  periodSeconds: 15
  timeoutSeconds: 5
  failureThreshold: 20
readinessProbe:
  exec:
    command: {{- include "disagg.frontendProbe" (dict "root" .root "path" .root.Values.frontend.readinessPath) | nindent 6 }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
{{- else -}}
startupProbe:
  exec:
    command: {{- include "disagg.rayletProbe" . | nindent 6 }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 60
livenessProbe:
  exec:
    command: {{- include "disagg.rayletProbe" . | nindent 6 }}
  periodSeconds: 15
  timeoutSeconds: 5
  failureThreshold: 8
readinessProbe:
  exec:
    command: {{- include "disagg.rayletProbe" . | nindent 6 }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
{{- end -}}
{{- end }}

{{/* Environment of every container that runs the program. */}}
{{- define "disagg.env" -}}
# The root file system is read-only; everything that is written goes to /tmp.
- {name: HOME, value: /tmp}
- {name: XDG_CACHE_HOME, value: /tmp/cache}
- {name: PYTHONDONTWRITEBYTECODE, value: "1"}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
# Serve's Python proxy costs about 10 ms a request more than HAProxy.
- {name: RAY_SERVE_ENABLE_HA_PROXY, value: "1"}
# Else it writes a line for each request, which a process of Serve's counts; front ends count theirs.
- {name: RAY_SERVE_HAPROXY_METRICS_ENABLED, value: "0"}
{{- end }}

{{/* Resources with the GPUs of a pool added. Takes a pool. */}}
{{- define "disagg.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if and .gpu .gpu.enabled -}}
{{- range $kind := list "requests" "limits" -}}
{{- $_ := set $resources $kind (set (index $resources $kind | default dict) $.gpu.resourceName $.tensorParallelSize) -}}
{{- end -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end }}

{{- define "disagg.nodeSelector" -}}
{{- $selector := deepCopy .nodeSelector -}}
{{- if and .gpu .gpu.enabled .gpu.product -}}
{{- $_ := set $selector .gpu.productLabel .gpu.product -}}
{{- end -}}
{{- if $selector -}}
{{- toYaml $selector -}}
{{- end -}}
{{- end }}

{{/* Affinity to the release's other workers, so that KV stays within a rack or zone. */}}
{{- define "disagg.affinity" -}}
{{- $topology := .pool.topology | default dict -}}
{{- if .pool.affinity -}}
{{- toYaml .pool.affinity -}}
{{- else if $topology.colocateBy -}}
{{- $labels := include "disagg.selectorLabels" .root | fromYaml -}}
{{- $workers := dict "key" "app.kubernetes.io/component" "operator" "In" "values" (list "prefill" "decode") -}}
{{- $selector := dict "matchLabels" $labels "matchExpressions" (list $workers) -}}
{{- $term := dict "topologyKey" $topology.colocateBy "labelSelector" $selector -}}
podAffinity:
  {{- if $topology.colocateRequired }}
  requiredDuringSchedulingIgnoredDuringExecution:
    {{- toYaml (list $term) | nindent 4 }}
  {{- else }}
  preferredDuringSchedulingIgnoredDuringExecution:
    {{- toYaml (list (dict "weight" 100 "podAffinityTerm" $term)) | nindent 4 }}
  {{- end }}
{{- end -}}
{{- end }}

{{/*
One pod template. Takes a dict:
  root       $
  component  head | frontend | prefill | decode
  pool       the values of that component
  ports      YAML list of container ports
  annotations  further annotations
*/}}
{{- define "disagg.podTemplate" -}}
{{- $root := .root -}}
{{- $v := $root.Values -}}
{{- $needsModel := and (ne .component "head") (ne $v.model.source "bundled") -}}
{{- $topology := .pool.topology | default dict -}}
metadata:
  labels:
    {{- include "disagg.selectorLabels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
    {{- with .pool.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with mergeOverwrite (dict) (.annotations | default dict) .pool.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- if and (eq .component "head") $v.ray.autoscaler.enabled }}
  # KubeRay makes a service account for the autoscaler in this pod.
  automountServiceAccountToken: true
  {{- else }}
  serviceAccountName: {{ include "disagg.serviceAccountName" $root }}
  automountServiceAccountToken: false
  {{- end }}
  enableServiceLinks: false
  {{- with $v.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with .pool.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .pool.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  terminationGracePeriodSeconds: {{ .pool.terminationGracePeriodSeconds }}
  securityContext:
    {{- toYaml $v.podSecurityContext | nindent 4 }}
  {{- with include "disagg.nodeSelector" .pool }}
  nodeSelector:
    {{- . | nindent 4 }}
  {{- end }}
  {{- with .pool.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "disagg.affinity" . }}
  affinity:
    {{- . | nindent 4 }}
  {{- end }}
  {{- if $topology.spreadBy }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: {{ $topology.spreadBy }}
      whenUnsatisfiable: {{ ternary "DoNotSchedule" "ScheduleAnyway" $topology.spreadRequired }}
      labelSelector:
        matchLabels:
          {{- include "disagg.selectorLabels" $root | nindent 10 }}
          app.kubernetes.io/component: {{ .component }}
  {{- end }}
  {{- if and $needsModel (eq $v.model.source "hub") }}
  initContainers:
    - name: fetch-model
      image: {{ include "disagg.image" (dict "root" $root "override" .pool.image) }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      command:
        - python3
        - /etc/disagg/scripts/fetch_model.py
        - {{ $v.model.hub.repository | quote }}
        - {{ $v.model.hub.revision | quote }}
        - {{ include "disagg.modelPath" $root | quote }}
      env:
        {{- include "disagg.env" $root | nindent 8 }}
        {{- with $v.model.hub.token.existingSecret }}
        - name: HF_TOKEN
          valueFrom:
            secretKeyRef: {name: {{ . }}, key: {{ $v.model.hub.token.key }}}
        {{- end }}
      resources:
        requests: {cpu: 500m, memory: 1Gi}
        limits: {cpu: "2", memory: 4Gi}
      securityContext:
        {{- toYaml $v.securityContext | nindent 8 }}
      volumeMounts:
        - {name: scripts, mountPath: /etc/disagg/scripts, readOnly: true}
        - {name: tmp, mountPath: /tmp}
        - {name: models, mountPath: {{ $v.model.cache.mountPath }}}
  {{- end }}
  containers:
    - name: {{ ternary "ray-head" "ray-worker" (eq .component "head") }}
      image: {{ include "disagg.image" (dict "root" $root "override" .pool.image) }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      env:
        {{- include "disagg.env" $root | nindent 8 }}
        {{- with .pool.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        {{- .ports | nindent 8 }}
      resources:
        {{- include "disagg.resources" .pool | nindent 8 }}
      securityContext:
        {{- toYaml $v.securityContext | nindent 8 }}
      {{- include "disagg.probes" . | nindent 6 }}
      {{- if eq .component "frontend" }}
      lifecycle:
        preStop:
          # Endpoints are taken out of load balancers meanwhile; until then requests still arrive.
          exec: {command: [sleep, "10"]}
      {{- end }}
      volumeMounts:
        - {name: scripts, mountPath: /etc/disagg/scripts, readOnly: true}
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        {{- if and $v.apiKey.enabled (eq .component "frontend") }}
        - {name: api-key, mountPath: /etc/disagg/secrets, readOnly: true}
        {{- end }}
        {{- if $v.tls.enabled }}
        - {name: tls, mountPath: /etc/disagg/tls, readOnly: true}
        {{- end }}
        {{- if $needsModel }}
        - {name: models, mountPath: {{ $v.model.cache.mountPath }}, readOnly: true}
        {{- end }}
  volumes:
    - name: scripts
      configMap: {name: {{ include "disagg.fullname" $root }}-scripts}
    - name: tmp
      emptyDir: {sizeLimit: {{ .pool.tmpSize }}}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ .pool.shmSize }}}
    {{- if and $v.apiKey.enabled (eq .component "frontend") }}
    - name: api-key
      secret:
        secretName: {{ include "disagg.apiKeySecret" $root }}
        defaultMode: 0440
        items: [{key: {{ $v.apiKey.key }}, path: api-key}]
    {{- end }}
    {{- if $v.tls.enabled }}
    - name: tls
      secret:
        secretName: {{ $v.tls.existingSecret }}
        defaultMode: 0440
    {{- end }}
    {{- if $needsModel }}
    - name: models
      {{- if eq $v.model.cache.type "claim" }}
      persistentVolumeClaim: {claimName: {{ include "disagg.cacheClaim" $root }}}
      {{- else }}
      emptyDir: {sizeLimit: {{ $v.model.cache.size }}}
      {{- end }}
    {{- end }}
{{- end }}
