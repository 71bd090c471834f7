// Where the server is and who calls: LORALINE_ADDRESS, LORALINE_API_KEY, LORALINE_TLS_CA, as for the `loraline` command.
import { readFileSync } from "node:fs";
import type { Interceptor } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";

const address = process.env.LORALINE_ADDRESS ?? "127.0.0.1:7600";
const ca = process.env.LORALINE_TLS_CA; // PEM of the authority that signed the server's certificate
const withKey: Interceptor = (next) => (request) => {
  request.header.set("authorization", `Bearer ${process.env.LORALINE_API_KEY ?? ""}`);
  return next(request);
};

export const transport = createGrpcTransport({
  baseUrl: `${ca ? "https" : "http"}://${address}`,
  nodeOptions: ca ? { ca: readFileSync(ca) } : {},
  interceptors: [withKey],
});
